"""The paper's experiments: their variants, how they are trained and what is concluded."""
