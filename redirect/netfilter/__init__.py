"""netfilter: one rule model, its nftables rendering, and the session which loads and lists it."""
