// Sends with @rudderstack/rudder-sdk-node: ADDRESS COUNT KEY; see `tests/clients/harness.py`.
import { setTimeout as sleep } from 'node:timers/promises'
import RudderAnalytics from '@rudderstack/rudder-sdk-node'

const [address, count, key] = process.argv.slice(2)
const client = new RudderAnalytics(key, {
  dataPlaneUrl: address,
  flushAt: 20,
  flushInterval: 100,
  retryCount: 20,
})
const failed = []
const sent = []
for (let n = 0; n < Number(count); n++) {
  sent.push(
    new Promise((resolve) => {
      client.track({ userId: 'user-1', event: 'Counted', properties: { n } }, (error) => {
        if (error) failed.push(error)
        resolve()
      })
    }),
  )
  if (n % 20 === 0) await sleep(20)
  if (n === Math.floor(count / 2)) console.log('half')
}
await client.flush()
await Promise.all(sent)
if (failed.length) {
  console.error(failed[0])
  process.exit(1)
}
process.exit(0)
