-- SCHEDULED | QUEUED → CANCELLED; RUNNING: the worker is asked to stop. Answers 'gone', 'same' (nothing was to be done), or the state
-- before.
even_when_full()
local job = load(a.job_id, 'cancel')
if not job then return 'gone' end
local before = job.state
if WAITS[before] then
  conclude(job, 'CANCELLED', {cancel = '1'})
elseif before == 'RUNNING' and job.cancel ~= '1' then
  change(a.job_id, {cancel = '1'})
else
  return 'same'
end
return before
