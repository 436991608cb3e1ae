// Sends with pino and pino-loki: ADDRESS COUNT; see `harness.py`.
import { once } from 'node:events'
import pino from 'pino'
import { pinoLoki } from 'pino-loki'

const [address, count] = [process.argv[2], Number(process.argv[3])]
let pending = 0

// pino-loki sends each batch once, with fetch; this one tries again.
const send = globalThis.fetch
globalThis.fetch = async (url, options) => {
  pending++
  for (let left = 300; left; left--) {
    const answer = await send(url, options).catch(() => undefined)
    if (answer && answer.status !== 429 && answer.status !== 503) { pending--; return answer }
    await new Promise((resolve) => setTimeout(resolve, 300))
  }
  throw new Error('Loki is not there')
}

const stream = pinoLoki({ host: address, labels: { app: 'shop' }, batching: { interval: 0.05 } })
const logger = pino({}, stream)

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))
for (let n = 0; n < count; n++) {
  logger.info({ n, meta: { trace: `t${n}` } }, 'an order')
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(20)
}
stream.end()
await once(stream, 'close')
while (pending) await pause(50)
process.exit(0)
