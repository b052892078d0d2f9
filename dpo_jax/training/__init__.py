"""From a config to a trained model: set up, shard, compile, train, save, resume."""
