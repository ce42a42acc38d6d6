"""A schema registry with the interface of Confluent's: schemas by id, and ids of schemas."""
