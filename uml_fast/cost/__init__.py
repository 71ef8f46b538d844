"""Operations, memory and time of a step: counted, measured and predicted."""
