"""The torch-native learner of elastic pretraining: parallelism, sharded AdamW, replay, burn-in."""
