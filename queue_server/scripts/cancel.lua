-- SCHEDULED | QUEUED → CANCELLED; RUNNING: the worker is asked to stop. Answers 'gone', or the state before.
even_when_full()
local id = a.job_id
local job = load(id, 'kind', 'queue', 'priority', 'cancel', 'created_ms')
if not job then return 'gone' end
if job.state == 'SCHEDULED' or job.state == 'QUEUED' then
  conclude(id, job, 'CANCELLED', {cancel = '1'})
  withdraw(id, job.queue, job.priority)
elseif job.state == 'RUNNING' and job.cancel ~= '1' then
  change(id, {cancel = '1'})
end
return job.state
