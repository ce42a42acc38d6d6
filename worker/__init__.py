"""Moves texts through a sentiment model, from Kafka to Kafka."""
