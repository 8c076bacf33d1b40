"""One model run by several processes, a rank each: on GPUs of one machine or more, or on CPUs.

Rank 0 is the process that was asked: it schedules, samples and answers. The others are told each
step's chunks (`steps.py`) through a channel each (`channel.py`), load their part of the weights
(model/share.py) and run the same steps by a runner of their own, whose sums meet through a process
group of torch's (`link.py`), small ones of GPUs that reach each other through memory that all write
into (`symmetric.py`). `ranks.py` starts them, watches them and ends them all when one is lost;
`member.py` is what they run.
"""
