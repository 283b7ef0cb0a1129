"""The inference server: vLLM's own application, plus forget domains that come and go while it runs.

domains     what is active, and the one place that changes it
api         HTTP of the admin side, and the epoch on everything else
metrics     Prometheus collectors
logs        JSON logs, with request ids and epochs
tracing     spans, in vLLM's own traces
settings    configuration of `alter serve`
plugin      how all of it enters vLLM's server
launch      starting vLLM's server around it
memory      what slots cost, and whether they fit
client, cli the admin side from outside
registry    the domains of a fleet, durable
engine      vLLM internals, behind the `ForgetEngine` protocol
"""
