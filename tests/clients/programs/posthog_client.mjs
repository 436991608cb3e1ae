// Sends with posthog-node: ADDRESS COUNT KEY; see `tests/clients/harness.py`.
import { setTimeout as sleep } from 'node:timers/promises'
import { PostHog } from 'posthog-node'

const [address, count, key] = process.argv.slice(2)
const client = new PostHog(key, {
  host: address,
  flushAt: 20,
  flushInterval: 100,
  maxQueueSize: 10_000,
  fetchRetryCount: 2,
  fetchRetryDelay: 200,
})
for (let n = 0; n < Number(count); n++) {
  client.capture({ distinctId: 'user-1', event: 'counted', properties: { n } })
  if (n % 20 === 0) await sleep(20)
  if (n === Math.floor(count / 2)) console.log('half')
}
// What could not be sent stays in the queue, and goes with the next flush, among later events.
for (let tries = 0; ; tries++) {
  try {
    await client.flush()
    break
  } catch (error) {
    if (tries === 300) throw error
    await sleep(200)
  }
}
await client.shutdown(60_000)
