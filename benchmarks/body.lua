-- POSTs the files that are its arguments, in turn, as the type that is the first; prints what came back as one line of JSON.
local requests, turn = {}, 0

function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = table.remove(args, 1)
  for number, path in ipairs(args) do
    local file = assert(io.open(path, "rb"))
    wrk.body = file:read("*a")
    file:close()
    requests[number] = wrk.format()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary)
  local errors = summary.errors
  io.write(string.format('{"answers": %d, "refused": %d, "broken": %d, "seconds": %.6f}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration / 1e6))
end
