-- FAILED | CANCELLED | EXPIRED → QUEUED: by hand, with all attempts before it; the attempts' numbers and errors go on.
-- Answers {'retried'}, {'gone'}, {'missing', media_id}, {'full', …}, or {'wrong', state}.
local id = a.job_id
local job = load(id)
if not job then return {'gone'} end
if job.state ~= 'FAILED' and job.state ~= 'CANCELLED' and job.state ~= 'EXPIRED' then return {'wrong', job.state} end
local media = redis.call('SMEMBERS', key('job', id, 'media'))
for _, file in ipairs(media) do
  if not file_size(file) then return {'missing', file} end
end
local full = check_limits(job.queue, job.client, tonumber(job.bytes))
if full then return full end
for _, file in ipairs(media) do pin(id, file) end
change(id, {
  state = 'QUEUED', spent = '0', done = '0', msg = '', cancel = '0', error = '', ended_ms = '0', expire_ms = '0',
  deadline_ms = '0', not_before_ms = '0',
})
redis.call('HDEL', key('job', id), 'hook_n', 'hook_ms', 'hook_error')
redis.call('ZREM', key('hooks'), id)
redis.call('ZREM', key('ended'), id)
move(job, 'QUEUED')
weigh(job, 1)
dispatch(job, nil)
return {'retried'}
