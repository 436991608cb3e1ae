// Sends with cloudevents: ADDRESS COUNT TOKEN; see `tests/clients/harness.py`.
import { setTimeout as sleep } from 'node:timers/promises'
import { CloudEvent, HTTP } from 'cloudevents'

const [address, count, token] = process.argv.slice(2)

// The library leaves it to its user to send an event until it is accepted.
async function send(message) {
  const headers = { ...message.headers, authorization: `Bearer ${token}` }
  for (let tries = 0; tries < 300; tries++) {
    try {
      const answer = await fetch(address, { method: 'POST', headers, body: message.body })
      const text = await answer.text()
      if (answer.status === 202) return
      if (![429, 503].includes(answer.status)) throw new Error(`${answer.status}: ${text}`)
    } catch (error) {
      if (!(error instanceof TypeError)) throw error // fetch: there is no connection
    }
    await sleep(200)
  }
  throw new Error('not accepted')
}

for (let n = 0; n < Number(count); n++) {
  const event = new CloudEvent({ type: 'counted', source: '/tests/client', id: String(n), data: { n } })
  await send(n % 2 ? HTTP.binary(event) : HTTP.structured(event))
  if (n === Math.floor(count / 2)) console.log('half')
}
