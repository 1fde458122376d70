"""Label jobs: sources -> plan -> teacher -> sealed shards."""
