"""The paper's experiments: their arms, how they are trained and what is concluded."""
