"""A simulated house: the very same loop, plan/ and execute/ code as in service, on a clock that jumps.

profile.py      what each model costs on a machine: rates, load time, memory, power, quality
simtime.py      an event loop whose clock jumps to the next thing that happens
machine.py      engines as a service model: prefill, continuous batching or serial decoding, power
cards.py        the fleet as its profile runs it
embedding.py    embedders that remember
adapters.py     the ports over it: backend, upstream, meter, resources, store
hindsight.py    what nobody can have in service: per-query oracle, Belady's eviction
house.py        the composition root, and one trial
"""
