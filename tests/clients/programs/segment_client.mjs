// Sends with @segment/analytics-node: ADDRESS COUNT KEY; see `tests/clients/harness.py`.
import { setTimeout as sleep } from 'node:timers/promises'
import { Analytics } from '@segment/analytics-node'

const [address, count, key] = process.argv.slice(2)
const analytics = new Analytics({ writeKey: key, host: address, flushAt: 20, flushInterval: 100 })
const failed = []
analytics.on('error', (error) => failed.push(error))
for (let n = 0; n < Number(count); n++) {
  analytics.track({ userId: 'user-1', event: 'Counted', properties: { n } })
  if (n % 20 === 0) await sleep(20)
  if (n === Math.floor(count / 2)) console.log('half')
}
await analytics.closeAndFlush({ timeout: 120_000 })
if (failed.length) {
  console.error(failed[0])
  process.exit(1)
}
