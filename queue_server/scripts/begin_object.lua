-- An object is being written, or still is (a.again): whoever writes it has a.write_ms to say so again, then it is swept.
-- Answers 1, or 0 when it has been swept already.
if a.again and not redis.call('ZSCORE', key('objects'), a.object) then return 0 end
redis.call('ZADD', key('objects'), now + a.write_ms, a.object)
return 1
