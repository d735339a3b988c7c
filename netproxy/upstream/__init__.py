"""Connections to endpoints: kept ones from the pool, fresh ones dialled inside the workload's namespace."""
