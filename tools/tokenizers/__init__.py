"""What the tests of the tokenizer and the commands about it share.

slow     the rules of the released tokenizer, written out plainly, one token at a time
samples  real SMILES, protein, DNA and prose: out of installed packages, or of files
"""
