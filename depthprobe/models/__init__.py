"""Backbones, block surgery, the recommender and the SASRec baseline."""
