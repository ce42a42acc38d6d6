"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""
