// Sends with winston and winston-splunk-httplogger: ADDRESS COUNT TOKEN; see `harness.py`.
import winston from 'winston'
import SplunkStreamEvent from 'winston-splunk-httplogger'

const [address, count] = [new URL(process.argv[2]), Number(process.argv[3])]

const transport = new SplunkStreamEvent({
  splunk: {
    protocol: 'http',
    host: address.hostname,
    port: Number(address.port),
    token: process.argv[4],
    index: 'main',
    sourcetype: 'shop',
    maxRetries: 10
  },
  exitOnError: false
})

// The logger gives up on an answer that is an error, such as 503; its error function sends again.
let lost = 0
const { server } = transport
server.error = (error, context) => {
  lost++
  setTimeout(() => { lost--; server._sendEvents(context, done) }, 200)
}
let ended = 0
const done = () => { ended++ }

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))

const logger = winston.createLogger({ transports: [transport] })
transport.on('logged', done)
for (let n = 0; n < count; n++) {
  logger.info('an order', { n })
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(10)
}
while (lost || ended < count) await pause(100)
process.exit(0)
