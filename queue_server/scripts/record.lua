-- What every transition is made of: keys, the clock, a change of a record with its event. Put before each script by __init__.py.
-- KEYS[1] is the hash tag, ARGV[1] the parameters as JSON, ARGV[2] bytes where the script takes some.
--
-- When Redis' memory is full it refuses a script at its first write if that write takes memory (SET, HSET), never later. A submission is
-- to be refused; everything else makes room or needs little, so it begins with even_when_full().
--
-- a.keep: how long things are kept, in ms. a.share: `window`, how many messages of one client's jobs lie in a broker's list at once,
-- and `running`, how many of its jobs of one queue run at once (0: any number).

local a = cjson.decode(ARGV[1])
local HISTORY = 1000 -- changes kept of one job; progress is reported ever more rarely, so that a job of weeks stays below
local ATTEMPTS = 20 -- attempts kept of one job: jobs.MAX_ATTEMPTS_KEPT
local SLOT_S = 10 -- keys.SLOT_S
local SLOT_TTL_S = 600
local PRIORITIES = {'interactive', 'standard', 'batch'} -- jobs.Priority
local BUCKETS_S = {0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600} -- statistics.BUCKETS_S

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

-- What most transitions need of a record.
local USUAL = {'state', 'kind', 'queue', 'client', 'priority', 'request_id', 'trace', 'created_ms', 'held', 'bytes'}

-- The usual and the named fields of a record, and its id; nil when there is no such job.
local function load(id, ...)
  local names = {unpack(USUAL)}
  for _, name in ipairs({...}) do names[#names + 1] = name end
  local values = redis.call('HMGET', key('job', id), unpack(names))
  if not values[1] then return nil end
  local record = {id = id}
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

local WAITS = {SCHEDULED = 1, QUEUED = 1}

-- Adds to a member's score, and drops it at zero.
local function tally(name, by, member)
  if tonumber(redis.call('ZINCRBY', name, by, member)) <= 0 then redis.call('ZREM', name, member) end
end

-- Adds to a hash's number, and drops it at zero.
local function add(name, field, by)
  if tonumber(redis.call('HINCRBY', name, field, by)) == 0 then redis.call('HDEL', name, field) end
end

-- Moves the job from the state of its record to another, between the indexes and the counts of its queue and its client. A job that is
-- made comes from nil, one that is forgotten goes to nil.
local function move(job, to)
  local id, queue, from = job.id, job.queue, job.state
  local counts = key('q', queue, 'n')
  if to then
    redis.call('HINCRBY', counts, to, 1)
    redis.call('ZADD', key('idx', 'state', to), 0, id)
    if to == 'SCHEDULED' then redis.call('ZADD', key('q', queue, 'later'), job.created_ms, id) end
    if to == 'RUNNING' then add(key('running'), queue .. ':' .. job.client, 1) end
  end
  if from then
    redis.call('HINCRBY', counts, from, -1)
    redis.call('ZREM', key('idx', 'state', from), id)
    if from == 'SCHEDULED' then redis.call('ZREM', key('q', queue, 'later'), id) end
    if from == 'RUNNING' then add(key('running'), queue .. ':' .. job.client, -1) end
  end
  local waiting = (WAITS[to] or 0) - (WAITS[from] or 0)
  if waiting ~= 0 then
    tally(key('clients'), waiting, job.client)
    tally(key('q', queue, 'clients'), waiting, job.client)
  end
  job.state = to
end

-- Counts the bytes that a job has in hand from its acceptance to its end; sign: 1 or -1.
local function weigh(job, sign)
  local bytes = sign * (tonumber(job.bytes) or 0)
  if bytes == 0 then return end
  for _, field in ipairs({'all', 'q:' .. job.queue, 'c:' .. job.client}) do add(key('bytes'), field, bytes) end
end

-- Sends Dramatiq's message, in Dramatiq's own layout. `sent`: the time that gives the job its place in the list; at_head: before all others.
local function list(job, sent, at_head)
  local id, priority = job.id, job.priority
  local number = redis.call('HINCRBY', key('job', id), 'dispatch', 1)
  local message = id .. '.' .. number
  local messages = key('d', priority)
  redis.call('HSET', key('job', id), 'sent_ms', int(sent))
  redis.call('HSET', messages .. '.msgs', message, cjson.encode({
    queue_name = 'jobs',
    actor_name = 'run',
    args = {id, number},
    kwargs = {},
    options = {redis_message_id = message, priority = priority},
    message_id = message,
    message_timestamp = now,
  }))
  redis.call(at_head and 'LPUSH' or 'RPUSH', messages, message)
  if not redis.call('ZSCORE', key('wait', priority), id) then
    redis.call('HINCRBY', key('listed'), table.concat({priority, job.queue, job.client}, ':'), 1)
  end
  redis.call('ZADD', key('wait', priority), sent, id)
end

-- Whether one more job of this client may be sent: its queue is not paused, and it has not its share of the list and the workers already.
local function has_room(queue, client, priority)
  local listed = redis.call('HMGET', key('listed'), priority .. ':' .. queue .. ':' .. client, 'interactive:' .. queue .. ':' .. client,
    'standard:' .. queue .. ':' .. client, 'batch:' .. queue .. ':' .. client)
  if tonumber(listed[1] or 0) >= a.share.window then return false end
  if redis.call('SISMEMBER', key('paused'), queue) == 1 then return false end
  if a.share.running == 0 then return true end
  local taken = tonumber(redis.call('HGET', key('running'), queue .. ':' .. client) or 0)
  for i = 2, 4 do taken = taken + tonumber(listed[i] or 0) end
  return taken < a.share.running
end

-- Has the job wait until its client has room again, in the place that `since` gives it.
local function hold(job, since)
  redis.call('ZADD', key('held', job.priority, job.queue, job.client), since, job.id)
  redis.call('HSET', key('job', job.id), 'held', '1')
  redis.call('HINCRBY', key('q', job.queue, 'n'), 'HELD', 1)
end

local function unhold(job)
  redis.call('ZREM', key('held', job.priority, job.queue, job.client), job.id)
  redis.call('HDEL', key('job', job.id), 'held')
  redis.call('HINCRBY', key('q', job.queue, 'n'), 'HELD', -1)
end

-- Has the job wait for a worker. `since`: it keeps the place it had and goes to the head; nil: it waits from now.
-- No client has more than a window of messages in the list, and each that leaves the list is followed by its next at the end: the list
-- goes round the clients, however many jobs each of them has.
local function dispatch(job, since)
  local sent = since or now
  redis.call('ZADD', key('q', job.queue, 'wait'), sent, job.id)
  if has_room(job.queue, job.client, job.priority) then
    list(job, sent, since ~= nil)
  else
    hold(job, sent)
  end
end

-- Sends held jobs of a client while there is room, the most urgent first, at most `limit`; the number sent.
local function release_held(queue, client, limit)
  local sent = 0
  if tonumber(redis.call('HGET', key('q', queue, 'n'), 'HELD') or 0) == 0 then return 0 end
  for _, priority in ipairs(PRIORITIES) do
    local held = key('held', priority, queue, client)
    while sent < limit do
      local id = redis.call('ZRANGE', held, 0, 0)[1]
      if not id or not has_room(queue, client, priority) then break end
      local job = {id = id, queue = queue, client = client, priority = priority}
      unhold(job)
      list(job, now, false)
      sent = sent + 1
    end
  end
  return sent
end

-- The job leaves the list. Its message may still lie in the broker: its number is stale then, and it is passed over.
local function unlist(job)
  if redis.call('ZREM', key('wait', job.priority), job.id) == 1 then
    add(key('listed'), table.concat({job.priority, job.queue, job.client}, ':'), -1)
  end
end

-- The job no longer waits for a worker; to be followed by release_held.
local function withdraw(job)
  redis.call('ZREM', key('q', job.queue, 'wait'), job.id)
  if job.held == '1' then unhold(job) else unlist(job) end
end

-- The size in bytes of a stored file; nil when it is not, or no longer, stored.
local function file_size(media)
  return tonumber(redis.call('HGET', key('media', media), 'size') or nil)
end

-- The job needs this stored file: it has no end until the job lets it go.
local function pin(id, media)
  redis.call('PERSIST', key('media', media))
  redis.call('PERSIST', key('blob', media))
  redis.call('SADD', key('media', media, 'jobs'), id)
end

-- The file is used; left_ms: its PTTL. It lives on for at least first_ms, or for as long as a job needs it. Answers its new PTTL.
local function renew_file(media, left_ms, first_ms)
  if left_ms < 0 or left_ms >= first_ms then return left_ms end
  local until_ms = int(now + first_ms)
  redis.call('PEXPIREAT', key('media', media), until_ms)
  redis.call('PEXPIREAT', key('blob', media), until_ms)
  return first_ms
end

-- The job no longer needs the file; one that no job needs lives on for a while, for the next job that names it.
local function unpin(id, media, keep_ms)
  local file, jobs = key('media', media), key('media', media, 'jobs')
  redis.call('SREM', jobs, id)
  if redis.call('EXISTS', file) == 0 then return end
  -- As long as the one that wants it longest allows.
  local until_ms = math.max(now + keep_ms, tonumber(redis.call('HGET', file, 'until_ms') or 0))
  redis.call('HSET', file, 'until_ms', int(until_ms))
  if redis.call('EXISTS', jobs) == 0 then
    redis.call('PEXPIREAT', file, int(until_ms))
    redis.call('PEXPIREAT', key('blob', media), int(until_ms))
  end
end

-- The job has ended: it no longer needs what it was given.
local function release(id, keep_ms)
  for _, media in ipairs(redis.call('SMEMBERS', key('job', id, 'media'))) do unpin(id, media, keep_ms) end
end

-- Counts a time in a histogram of Prometheus: 'total' (submission to end), 'wait' (queued to begun) or 'run' (an attempt).
local function observe(job, name, ms)
  local bucket = 'inf'
  for _, bound in ipairs(BUCKETS_S) do
    if ms <= bound * 1000 then
      bucket = tostring(bound)
      break
    end
  end
  local times = key('q', job.queue, 'times', job.kind)
  redis.call('HINCRBY', times, name .. ':' .. bucket, 1)
  redis.call('HINCRBY', times, name .. ':ms', int(math.max(0, ms)))
end

-- Counts an attempt that has ended: 'succeeded', 'failed', 'retried', 'cancelled', 'handed_back' or 'lost'.
local function count_attempt(job, outcome, since)
  redis.call('HINCRBY', key('q', job.queue, 'n'), 'outcome:' .. job.kind .. ':' .. outcome, 1)
  observe(job, 'run', now - tonumber(since))
end

-- Counts an end: for Prometheus (for ever) and for GetQueueStats (10 min).
local function count(job, state)
  local queue, latency_ms = job.queue, now - tonumber(job.created_ms)
  redis.call('HINCRBY', key('q', queue, 'n'), 'ended:' .. job.kind .. ':' .. state, 1)
  local slot = key('q', queue, 'slot', int(math.floor(now / 1000 / SLOT_S)))
  redis.call('HINCRBY', slot, state, 1)
  -- Steps of 10 %: a quantile read from them is at most that far off.
  local step = math.max(0, math.floor(math.log(math.max(1, latency_ms)) / math.log(1.1)))
  redis.call('HINCRBY', slot, 'b' .. step, 1)
  redis.call('EXPIRE', slot, SLOT_TTL_S)
  observe(job, 'total', latency_ms)
end

-- Ends a job; `fields` go into the record with the state.
local function conclude(job, state, fields)
  local id = job.id
  local keep_ms = state == 'FAILED' and a.keep.failed_ms or a.keep.ended_ms
  fields.state = state
  fields.ended_ms = int(now)
  fields.expire_ms = int(now + keep_ms)
  change(id, fields)
  redis.call('ZADD', key('ended'), now + keep_ms, id)
  redis.call('ZREM', key('leases'), id)
  redis.call('ZREM', key('delayed'), id)
  redis.call('ZREM', key('deadlines'), id)
  if WAITS[job.state] then withdraw(job) end
  move(job, state)
  weigh(job, -1)
  release(id, state == 'SUCCEEDED' and a.keep.media_ms or a.keep.failed_media_ms)
  count(job, state)
  if redis.call('HEXISTS', key('job', id), 'hook') == 1 then redis.call('ZADD', key('hooks'), now, id) end
  if not a.quiet then release_held(job.queue, job.client, a.share.window) end
end

-- The fields that end attempt number `number`; `since` and `worker` come from the record. `failure`: a base64 Status or ''.
local function attempt_fields(number, since, worker, failure)
  return {['att:' .. number] = cjson.encode({tonumber(since), now, worker, failure})}
end

-- Removes every trace of a job.
local function forget(id, job)
  release(id, a.keep.media_ms)
  move(job, nil)
  for _, index in ipairs({'idx:all', 'idx:queue:' .. job.queue, 'idx:client:' .. job.client, 'ended', 'hooks'}) do
    redis.call('ZREM', key(index), id)
  end
  if job.request_id ~= '' then
    local idem = key('idem', job.client, job.request_id)
    if redis.call('HGET', idem, 'job') == id then redis.call('DEL', idem) end
  end
  for _, media in ipairs(redis.call('SMEMBERS', key('job', id, 'files'))) do unpin(id, media, a.keep.media_ms) end
  redis.call('DEL', key('job', id), key('job', id, 'ev'), key('job', id, 'work'), key('job', id, 'res'),
    key('job', id, 'base'), key('job', id, 'media'), key('job', id, 'files'))
end

-- What a new job of this many bytes would find no room in: {'full', its name, what there is, its limit}; nil when there is room.
local function check_limits(queue, client, bytes)
  local counts = redis.call('HMGET', key('q', queue, 'n'), 'QUEUED', 'SCHEDULED')
  local bytes_held = redis.call('HMGET', key('bytes'), 'all', 'q:' .. queue, 'c:' .. client)
  local limits = {
    {'depth', redis.call('ZCARD', key('idx', 'state', 'QUEUED')) + redis.call('ZCARD', key('idx', 'state', 'SCHEDULED')) + 1},
    {'queue_depth', tonumber(counts[1] or 0) + tonumber(counts[2] or 0) + 1},
    {'client_depth', tonumber(redis.call('ZSCORE', key('clients'), client) or 0) + 1},
    {'bytes', tonumber(bytes_held[1] or 0) + bytes},
    {'queue_bytes', tonumber(bytes_held[2] or 0) + bytes},
    {'client_bytes', tonumber(bytes_held[3] or 0) + bytes},
  }
  for _, limit in ipairs(limits) do
    if limit[2] > a.limits[limit[1]] then return {'full', limit[1], int(limit[2])} end
  end
  if redis.call('SISMEMBER', key('queues'), queue) == 0 and redis.call('SCARD', key('queues')) >= a.limits.queues then
    return {'full', 'queues', int(redis.call('SCARD', key('queues')) + 1)}
  end
end
