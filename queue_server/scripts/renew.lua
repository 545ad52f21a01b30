-- RUNNING → RUNNING: the lease goes on; progress, when there is some, is a change. Fenced by the attempt.
-- Answers 'lost', 'cancel' (someone asked to) or 'ok'.
even_when_full()
local id = a.job_id
local job = load(id, 'attempt', 'claim', 'cancel', 'done', 'total', 'msg')
if not job or job.state ~= 'RUNNING' or tonumber(job.attempt) ~= a.attempt or job.claim ~= a.claim_id then return 'lost' end
local done, total = int(a.done), int(a.total)
if done ~= job.done or total ~= job.total or a.msg ~= job.msg then
  change(id, {done = done, total = total, msg = a.msg})
end
redis.call('ZADD', key('leases'), now + a.lease_ms, id)
return job.cancel == '1' and 'cancel' or 'ok'
