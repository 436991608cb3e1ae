// Sends with pino and pino-datadog-transport: ADDRESS COUNT; see `harness.py`.
import pino from 'pino'
import datadog from 'pino-datadog-transport'

const [address, count] = [process.argv[2], Number(process.argv[3])]
let sent = 0
const onDebug = (text) => { sent += Number(/Sending (\d+) logs to Datadog completed/.exec(text)?.[1] ?? 0) }

const stream = datadog({
  ddClientConf: {
    authMethods: { apiKeyAuth: '0123456789abcdef0123456789abcdef' },
    serverIndex: 1
  },
  ddServerConf: { protocol: 'http', name: new URL(address).host },
  service: 'shop',
  retries: 20,
  sendIntervalMs: 100,
  onDebug,
  onError: (error) => { console.error(error); process.exit(1) }
})
const logger = pino({}, stream)

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))
for (let n = 0; n < count; n++) {
  logger.info({ n })
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(20)
}
while (sent < count) await pause(100)
process.exit(0)
