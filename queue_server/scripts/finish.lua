-- RUNNING → SUCCEEDED | FAILED | CANCELLED | SCHEDULED | QUEUED: the worker's word about its attempt. Fenced by the attempt; the same
-- word twice is fine. ARGV[2]: the JobResult, for SUCCEEDED. Answers {'done' | 'again', state} or {'refused', why}.
even_when_full()
local id = a.job_id
local job = load(id, 'attempt', 'claim', 'spent', 'cancel', 'finished', 'started_ms', 'worker', 'deadline_ms', 'sent_ms')
if not job then return {'refused', 'there is no such job'} end
if job.finished == a.claim_id then return {'again', job.state} end
if job.state ~= 'RUNNING' then return {'refused', 'it is ' .. job.state} end
-- The claim too: after Redis has lost its last second, another worker may have begun an attempt of the same number.
if tonumber(job.attempt) ~= a.attempt or job.claim ~= a.claim_id then return {'refused', 'attempt ' .. job.attempt .. ' of ' .. job.worker .. ' runs'} end

local state, failure = a.state, a.error
-- A job that is to be cancelled is not tried again; one that got done meanwhile is done.
if job.cancel == '1' and state ~= 'SUCCEEDED' then state = 'CANCELLED' end
if state == 'SUCCEEDED' then
  for _, file in ipairs(a.files) do
    if not file_size(file) then return {'refused', 'its file ' .. file .. ' is no longer kept'} end
  end
  redis.call('SET', key('job', id, 'res'), ARGV[2])
end
redis.call('HSET', key('job', id), 'finished', a.claim_id)
local fields = attempt_fields(a.attempt, job.started_ms, job.worker, state == 'CANCELLED' and '' or failure)
if a.free and state ~= 'CANCELLED' then fields.spent = int(tonumber(job.spent) - 1) end
count_attempt(job, ({SCHEDULED = 'retried', QUEUED = 'handed_back'})[state] or string.lower(state), job.started_ms)

if state == 'SUCCEEDED' or state == 'FAILED' or state == 'CANCELLED' then
  if state == 'FAILED' then fields.error = a.job_error end
  fields.done, fields.total, fields.msg = int(a.done), int(a.total), a.msg
  conclude(job, state, fields)
  if state == 'SUCCEEDED' then
    -- After the inputs were let go: a file may be both.
    for _, file in ipairs(a.files) do
      pin(id, file)
      redis.call('SADD', key('job', id, 'files'), file)
    end
  end
  return {'done', state}
end
fields.state = state
change(id, fields)
redis.call('ZREM', key('leases'), id)
move(job, state)
if tonumber(job.deadline_ms) > 0 then redis.call('ZADD', key('deadlines'), job.deadline_ms, id) end
if state == 'SCHEDULED' then
  redis.call('ZADD', key('delayed'), now + a.delay_ms, id)
else
  dispatch(job, tonumber(job.sent_ms))
end
release_held(job.queue, job.client, a.share.window)
return {'done', state}
