"""Data: LightningDataModules that yield `Batch`es."""
