-- nothing → stored: the bytes are there already, in a.object, in the key a.part or (a small file) in ARGV[2]; now they are a file.
-- Answers 'stored', 'same' (others have stored the same bytes: these are superfluous), or 'late' (the bytes have been swept away).
local file, blob = key('media', a.media_id), key('blob', a.media_id)
local part = a.part ~= '' and key('part', a.part) or nil
local left_ms = redis.call('PTTL', file)
if left_ms ~= -2 then
  even_when_full()
  renew_file(a.media_id, left_ms, a.first_ms)
  -- Bytes within a submission have no type.
  if a.type ~= '' and redis.call('HGET', file, 'type') == '' then redis.call('HSET', file, 'type', a.type) end
  if part then redis.call('DEL', part) end
  -- The server's own second try of a call whose answer was lost.
  if a.object ~= '' and redis.call('HGET', file, 'object') == a.object then return 'stored' end
  if a.object ~= '' and redis.call('ZREM', key('objects'), a.object) == 1 then
    redis.call('ZADD', key('objects'), now, a.object .. ' -')
  end
  return 'same'
end
local until_ms = int(now + a.first_ms)
if a.object ~= '' then
  if not redis.call('ZSCORE', key('objects'), a.object) then
    even_when_full()
    redis.call('ZADD', key('objects'), now, a.object .. ' -') -- it was swept, and written to its end all the same
    return 'late'
  end
  redis.call('ZADD', key('objects'), until_ms, a.object .. ' ' .. a.media_id)
  redis.call('ZREM', key('objects'), a.object)
elseif part then
  if redis.call('STRLEN', part) ~= a.size then return 'late' end
  redis.call('HSET', file, 'size', int(a.size)) -- takes memory: a full Redis refuses here, before anything has changed
  redis.call('RENAME', part, blob)
  redis.call('PEXPIREAT', blob, until_ms)
else
  redis.call('SET', blob, ARGV[2], 'PXAT', until_ms)
end
redis.call('HSET', file, 'size', int(a.size), 'type', a.type, 'object', a.object, 'place', a.object == '' and 'redis' or 'object',
  'stored_ms', int(now))
redis.call('PEXPIREAT', file, until_ms)
return 'stored'
