"""Training a network: DeepSpeed's engine, and the states that training resumes from."""
