// Sends with winston and winston-elasticsearch: ADDRESS COUNT TOKEN; see `harness.py`.
import winston from 'winston'
import { ElasticsearchTransport } from 'winston-elasticsearch'

const [address, count, token] = [process.argv[2], Number(process.argv[3]), process.argv[4]]

const transport = new ElasticsearchTransport({
  clientOpts: {
    node: `${address}/elastic`,
    auth: { username: 'shop', password: token },
    maxRetries: 30,
    retryBackoff: () => 300
  },
  indexPrefix: 'logs',
  flushInterval: 50
})
transport.on('warning', (error) => console.error(error))
const logger = winston.createLogger({ transports: [transport] })
logger.on('error', (error) => console.error(error))

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds))

let sent = 0
const bulk = transport.client.bulk.bind(transport.client)
transport.client.bulk = async (request) => {
  const answer = await bulk(request)
  sent += answer.items.length
  return answer
}
for (let n = 0; n < count; n++) {
  logger.info('an order', { n })
  if (n === count / 2) console.log('half')
  if (n % 20 === 0) await pause(5)
}
while (sent < count) await pause(50)
process.exit(0)
