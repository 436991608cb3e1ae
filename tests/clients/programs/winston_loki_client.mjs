// Sends with winston and winston-loki: ADDRESS COUNT json|protobuf; see `harness.py`.
import winston from 'winston'
import LokiTransport from 'winston-loki'

const [address, count, form] = [process.argv[2], Number(process.argv[3]), process.argv[4]]

const transport = new LokiTransport({
  host: address,
  labels: { app: 'shop' },
  json: form === 'json',
  interval: 0.1,
  format: winston.format.json(),
  gracefulShutdown: false
})
// After an error it waits for a minute before it sends the batch again.
transport.batcher.circuitBreakerInterval = 500

const logger = winston.createLogger({ transports: [transport] })

const { batcher } = transport
if (!batcher.contentType.endsWith(form)) process.exit(3)
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))
for (let n = 0; n < count; n++) {
  logger.info('an order', { n })
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(20)
}
await pause(200)
while (batcher.batchesSending || batcher.batch.streams.length) await pause(100)
process.exit(0)
