"""Planning: what this machine is, what it can do, and what a run will cost, before it is started."""
