-- Forgets a job that has ended. Answers 'gone', 'deleted', or the state that forbids it.
even_when_full()
local job = load(a.job_id)
if not job then return 'gone' end
if WAITS[job.state] or job.state == 'RUNNING' then return job.state end
forget(a.job_id, job)
redis.call('XADD', key('door'), 'MAXLEN', '~', '4096', '*', 'j', a.job_id)
return 'deleted'
