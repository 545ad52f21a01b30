-- nothing → QUEUED | SCHEDULED: the record, its indexes, its first change, the broker's message, all or nothing.
-- ARGV[2]: the Work. Answers {'created' | 'same', record} or {what is wrong, value}.
local idem = a.request_id ~= '' and key('idem', a.client, a.request_id) or nil
if idem then
  local seen = redis.call('HMGET', idem, 'job', 'fp')
  if seen[1] and redis.call('EXISTS', key('job', seen[1])) == 1 then
    if seen[2] ~= a.fingerprint then return {'reused', seen[1]} end
    -- The server's own second try of a call whose answer was lost is still the call that made the job.
    return {seen[1] == a.job_id and 'created' or 'same', redis.call('HGETALL', key('job', seen[1]))}
  end
elseif redis.call('EXISTS', key('job', a.job_id)) == 1 then
  return {'created', redis.call('HGETALL', key('job', a.job_id))}
end
if a.deadline_ms > 0 and a.deadline_ms <= now then return {'late', int(now)} end
local bytes = #ARGV[2]
for _, media in ipairs(a.media) do
  local size = file_size(media)
  if not size then return {'missing', media} end
  bytes = bytes + size
end
local full = check_limits(a.queue, a.client, bytes)
if full then return full end

local id = a.job_id
local later = a.not_before_ms > now
redis.call('SET', key('job', id, 'work'), ARGV[2])
redis.call('HSET', key('job', id),
  'id', id, 'kind', a.kind, 'queue', a.queue, 'priority', a.priority, 'labels', a.labels, 'request_id', a.request_id,
  'max_attempts', int(a.max_attempts), 'created_ms', int(now), 'rev', '0', 'dispatch', '0',
  'client', a.client, 'trace', a.trace, 'bytes', int(bytes))
if a.hook ~= '' then redis.call('HSET', key('job', id), 'hook', a.hook) end
local state = later and 'SCHEDULED' or 'QUEUED'
change(id, {
  state = state, attempt = '0', spent = '0', done = '0', total = int(a.item_count),
  not_before_ms = int(a.not_before_ms), deadline_ms = int(a.deadline_ms),
})
redis.call('SADD', key('queues'), a.queue)
redis.call('ZADD', key('idx', 'all'), 0, id)
redis.call('ZADD', key('idx', 'queue', a.queue), 0, id)
redis.call('ZADD', key('idx', 'client', a.client), 0, id)
local job = {id = id, queue = a.queue, client = a.client, priority = a.priority, created_ms = int(now), bytes = bytes}
move(job, state)
weigh(job, 1)
if idem then
  redis.call('HSET', idem, 'job', id, 'fp', a.fingerprint)
  redis.call('PEXPIRE', idem, a.keep.request_id_ms)
end
for _, media in ipairs(a.media) do
  pin(id, media)
  redis.call('SADD', key('job', id, 'media'), media)
end
if a.deadline_ms > 0 then redis.call('ZADD', key('deadlines'), a.deadline_ms, id) end
if later then
  redis.call('ZADD', key('delayed'), a.not_before_ms, id)
else
  dispatch(job, nil)
end
return {'created', redis.call('HGETALL', key('job', id))}
