-- Which of these images are not stored? Those that are live on for at least their first lifetime, until a job claims them.
local missing = {}
for _, media in ipairs(a.media) do
  local left_ms = redis.call('PTTL', key('blob', media))
  if left_ms == -2 then
    missing[#missing + 1] = media
  elseif left_ms >= 0 and left_ms < a.first_ms then
    redis.call('PEXPIRE', key('blob', media), a.first_ms)
  end
end
return missing
