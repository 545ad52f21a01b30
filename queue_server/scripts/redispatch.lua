-- QUEUED → QUEUED: a message that will not be worked on is sent again under the next number, at the head of the list.
-- Answers 1, or 0 when the job has moved on.
even_when_full()
local job = load(a.job_id, 'dispatch', 'sent_ms')
if not job or job.state ~= 'QUEUED' or job.held == '1' or tonumber(job.dispatch) ~= a.dispatch_no then return 0 end
list(job, tonumber(job.sent_ms), true)
return 1
