"""Names: answers for those of the mesh, the workload's own resolvers for the rest."""
