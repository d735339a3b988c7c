"""Who we are and whom we trust: CA, SVIDs, trust bundles, mesh TLS."""
