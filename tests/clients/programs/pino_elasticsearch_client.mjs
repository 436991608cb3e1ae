// Sends with pino and pino-elasticsearch: ADDRESS COUNT TOKEN; see `harness.py`.
import elasticsearch from '@elastic/elasticsearch'
import pino from 'pino'
import pinoElastic from 'pino-elasticsearch'

const [address, count, token] = [process.argv[2], Number(process.argv[3]), process.argv[4]]

// pino-elasticsearch passes on no setting for retries; its second argument is the client to use.
class Client extends elasticsearch.Client {
  constructor (options) {
    super({ ...options, maxRetries: 30, retryBackoff: () => 300 })
  }
}

const stream = pinoElastic(
  {
    node: `${address}/elastic`,
    auth: { apiKey: token },
    index: 'logs-%{DATE}',
    esVersion: 8,
    flushBytes: 2000
  },
  { Client }
)
stream.on('error', (error) => { console.error(error); process.exit(1) })
stream.on('insertError', (error) => { console.error(error); process.exit(1) })
stream.on('insert', (stats) => process.exit(stats.successful === count ? 0 : 1))

const logger = pino({}, stream)
for (let n = 0; n < count; n++) {
  logger.info({ n })
  if (n === count / 2) console.log('half')
  if (n % 20 === 0) await new Promise((resolve) => setTimeout(resolve, 5))
}
stream.end()
