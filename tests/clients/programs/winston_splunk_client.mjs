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
const { server } = transport
server.error = (error, context) => {
  setTimeout(() => server._sendEvents(context, () => {}), 200)
}

// Each that is refused is begun once more.
const { error: sendAgain, _sendEvents: send } = server
let [begun, open, refused] = [0, 0, 0]
server.error = (...told) => { refused++; sendAgain(...told) }
server._sendEvents = (context, callback) => {
  begun++
  open++
  send.call(server, context, (...answer) => { open--; callback(...answer) })
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))

const logger = winston.createLogger({ transports: [transport] })
for (let n = 0; n < count; n++) {
  logger.info('an order', { n })
  if (n === count / 2) console.log('half')
  if (n % 10 === 0) await pause(10)
}
while (begun < count + refused || open) await pause(100)
process.exit(0)
