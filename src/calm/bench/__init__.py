"""The real thing, measured: real servers, engines and models over HTTP.

measure*.py   `calm profile`: rates, load time, memory, power and answers of every model of a fleet
server.py     a CALM server of its own for each trial
client.py     sends a workload at its times, judges the answers, gives feedback
trials.py     a trial's record, from the clients' and the server's side
progress.py   what is shown while a campaign runs
campaign.py   trials interleaved over policies and seeds; resumes where it was interrupted
"""
