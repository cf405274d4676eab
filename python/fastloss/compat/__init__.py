"""Drop-in replacements for the contrastive losses of other libraries: their names, arguments, defaults and numbers,
without the similarity matrix.

One module for each library, which is not needed and never imported: `open_clip`, `sentence_transformers`, `lightly`,
`pytorch_metric_learning`, `grad_cache`. Change the import, nothing else:

    from fastloss.compat.open_clip import ClipLoss, SigLipLoss

Where the libraries differ, each module does as its own library does and says so:

- Normalisation: open_clip and GradCache take embeddings as they are; lightly, pytorch-metric-learning and
  sentence-transformers take cosines.
- The denominator: CLIP, NT-Xent and SupCon hold all positives in it; DCL holds none; pytorch-metric-learning's
  NTXentLoss only the one whose probability it is.
- The mean: SigLIP divides by rows, not by pairs; pytorch-metric-learning's NTXentLoss by positive pairs, its SupConLoss
  by the rows whose loss is above 0; all others by rows.
- Queues: lightly reads its memory bank before it adds the batch.
"""
