"""HTTP: the admin side under `/admin`, and the epoch on everything that generates.

runtime      what a request finds at its application: the service, once there is one
app          puts all of it on vLLM's application
routes       /admin
models       its bodies
problems     its errors, RFC 9457
auth         its bearer tokens and their roles
request_ids  one id for a request
attempts     refused changes in the audit log
conditions   ETag, If-Match, If-None-Match
idempotency  Idempotency-Key
preferences  Prefer: wait=N
health       /health/live, /health/ready
middleware   x-alter-epoch, and the refusal to generate without trust or lease
closed_routes  routes of vLLM that do not answer
sse          where a comment may stand in an event stream
"""
