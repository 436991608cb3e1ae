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

// The logger gives up on an answer that is an error, such as 503, and counts it as logged; its error
// function, which it calls before it is done with the answer, sends again.
const { server } = transport
const send = server._sendEvents.bind(server)
let [begun, open, waiting] = [0, 0, 0]
const sendCounted = (context, callback) => {
  open++
  send(context, (...answer) => { open--; callback(...answer) })
}
server._sendEvents = (context, callback) => { begun++; sendCounted(context, callback) }
server.error = (error, context) => {
  waiting++
  setTimeout(() => { waiting--; sendCounted(context, () => {}) }, 200)
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))

const logger = winston.createLogger({ transports: [transport] })
for (let n = 0; n < count; n++) {
  logger.info('an order', { n })
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(10)
}
while (begun < count || open || waiting) await pause(100)
process.exit(0)
