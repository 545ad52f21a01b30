-- What every transition is made of: keys, the clock, a change of a record with its event. Put before each script by __init__.py.
-- KEYS[1] is the hash tag, ARGV[1] the parameters as JSON, ARGV[2] bytes where the script takes some.
--
-- When Redis' memory is full it refuses a script at its first write if that write takes memory (SET, HSET), never later. A submission is
-- to be refused; everything else makes room or needs little, so it begins with even_when_full().

local a = cjson.decode(ARGV[1])
local HISTORY = 1000 -- changes kept of one job; progress is reported ever more rarely, so that a job of weeks stays below
local ATTEMPTS = 20 -- attempts kept of one job: jobs.MAX_ATTEMPTS_KEPT
local SLOT_S = 10 -- keys.SLOT_S
local SLOT_TTL_S = 600
local LATENCY_S = {0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600} -- metrics.LATENCY_BUCKETS_S

local function key(...)
  return KEYS[1] .. ':' .. table.concat({...}, ':')
end

-- Redis' clock, in milliseconds: one clock for all servers and workers.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function int(number)
  return string.format('%.0f', number)
end

local function even_when_full()
  redis.call('DEL', key('nothing'))
end

-- The named fields of a record; nil when there is no such job.
local function load(id, ...)
  local names = {'state', ...}
  local values = redis.call('HMGET', key('job', id), unpack(names))
  if not values[1] then return nil end
  local record = {}
  for i, name in ipairs(names) do
    record[name] = values[i] or ''
  end
  return record
end

-- Writes the fields into the record and appends them as a change: the record is what its changes add up to.
local function change(id, fields)
  local record, changes = key('job', id), key('job', id, 'ev')
  local flat = {}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  if #flat > 0 then redis.call('HSET', record, unpack(flat)) end
  local revision = redis.call('HINCRBY', record, 'rev', 1)
  fields.rev = int(revision)
  redis.call('RPUSH', changes, cjson.encode(fields))
  if revision > HISTORY then
    -- The oldest change goes into the base that the others are told from.
    for name, value in pairs(cjson.decode(redis.call('LPOP', changes))) do
      redis.call('HSET', record .. ':base', name, value)
    end
  end
  redis.call('XADD', key('door'), 'MAXLEN', '~', '4096', '*', 'j', id)
end

-- Moves the job between the indexes and the counts of its queue; from or to may be nil.
local function move(id, queue, from, to)
  local counts = key('q', queue, 'n')
  if to then
    redis.call('HINCRBY', counts, to, 1)
    redis.call('ZADD', key('idx', 'state', to), 0, id)
  end
  if from then
    redis.call('HINCRBY', counts, from, -1)
    redis.call('ZREM', key('idx', 'state', from), id)
  end
end

-- Sends Dramatiq's message, in Dramatiq's own layout, and notes since when the job waits.
-- `since`: keep the place of a job that was handed back; nil: it waits from now.
local function dispatch(id, queue, priority, since)
  local number = redis.call('HINCRBY', key('job', id), 'dispatch', 1)
  local message = id .. '.' .. number
  local list = key('d', priority)
  local sent = since or now
  redis.call('HSET', key('job', id), 'sent_ms', int(sent))
  redis.call('HSET', list .. '.msgs', message, cjson.encode({
    queue_name = 'jobs',
    actor_name = 'run',
    args = {id, number},
    kwargs = {},
    options = {redis_message_id = message, priority = priority},
    message_id = message,
    message_timestamp = now,
  }))
  redis.call(since and 'LPUSH' or 'RPUSH', list, message)
  redis.call('ZADD', key('wait', priority), sent, id)
  redis.call('ZADD', key('q', queue, 'wait'), sent, id)
end

-- The job no longer waits for a worker. Its message may still lie in the broker: its number is stale then, and it is passed over.
local function withdraw(id, queue, priority)
  redis.call('ZREM', key('wait', priority), id)
  redis.call('ZREM', key('q', queue, 'wait'), id)
end

-- The job no longer needs its images; an image that no job needs lives on for a while, for the next job that names it.
local function release(id)
  local needed = key('job', id, 'media')
  for _, media in ipairs(redis.call('SMEMBERS', needed)) do
    local blob = key('blob', media)
    redis.call('SREM', blob .. ':jobs', id)
    if redis.call('EXISTS', blob .. ':jobs') == 0 then
      redis.call('PEXPIRE', blob, a.keep.media_ms)
    end
  end
  redis.call('DEL', needed)
end

-- Counts an end: for Prometheus (for ever) and for GetQueueStats (10 min).
local function count(queue, kind, state, latency_ms)
  redis.call('HINCRBY', key('q', queue, 'n'), 'ended:' .. kind .. ':' .. state, 1)
  local slot = key('q', queue, 'slot', int(math.floor(now / 1000 / SLOT_S)))
  redis.call('HINCRBY', slot, state, 1)
  -- Steps of 10 %: a quantile read from them is at most that far off.
  local step = math.max(0, math.floor(math.log(math.max(1, latency_ms)) / math.log(1.1)))
  redis.call('HINCRBY', slot, 'b' .. step, 1)
  redis.call('EXPIRE', slot, SLOT_TTL_S)
  local histogram = key('q', queue, 'lat', kind)
  for _, bound in ipairs(LATENCY_S) do
    if latency_ms <= bound * 1000 then redis.call('HINCRBY', histogram, tostring(bound), 1) end
  end
  redis.call('HINCRBY', histogram, 'count', 1)
  redis.call('HINCRBYFLOAT', histogram, 'sum', string.format('%.3f', latency_ms / 1000))
end

-- Ends a job. `record` needs queue, kind and created_ms; `fields` go into the record with the state.
local function conclude(id, record, state, fields)
  local keep_ms = state == 'FAILED' and a.keep.failed_ms or a.keep.ended_ms
  fields.state = state
  fields.ended_ms = int(now)
  fields.expire_ms = int(now + keep_ms)
  change(id, fields)
  redis.call('ZADD', key('ended'), now + keep_ms, id)
  redis.call('ZREM', key('leases'), id)
  redis.call('ZREM', key('delayed'), id)
  redis.call('ZREM', key('deadlines'), id)
  move(id, record.queue, record.state, state)
  release(id)
  count(record.queue, record.kind, state, now - tonumber(record.created_ms))
end

-- The fields that end attempt number `number`; `since` and `worker` come from the record. `failure`: a base64 Status or ''.
local function attempt_fields(number, since, worker, failure)
  return {['att:' .. number] = cjson.encode({tonumber(since), now, worker, failure})}
end

-- Removes every trace of a job.
local function forget(id, record)
  release(id)
  move(id, record.queue, record.state, nil)
  for _, index in ipairs({'idx:all', 'idx:queue:' .. record.queue, 'ended', 'leases', 'delayed', 'deadlines'}) do
    redis.call('ZREM', key(index), id)
  end
  if record.request_id ~= '' then
    local idem = key('idem', record.request_id)
    if redis.call('HGET', idem, 'job') == id then redis.call('DEL', idem) end
  end
  redis.call('DEL', key('job', id), key('job', id, 'ev'), key('job', id, 'work'), key('job', id, 'res'),
    key('job', id, 'base'))
end
