"""Expert expansion: a model of E experts in one group becomes one of k*E experts in G groups (paper section on expansion; spec 1.3).

Every expert is copied k times; a router row goes with its expert. What differs is which group gets which copy:

    routing_counts   which experts a calibration set's tokens choose, at which rank, and together with which others
    cuts             balanced partitions of the experts that put experts chosen together into different parts
    assignment       the methods: pairs (every group gets well-trained experts), ranked (the rejected one), random, copy
    manifest         the JSON that says which slot of which group in which layer is which expert of the source
    checkpoint       applies a manifest to a checkpoint in the released layout, tensor by tensor

When the output stays the same
------------------------------
The grown router's logits are those of the copies' sources, so its softmax gives each copy p_i / k, and each group picks the copies of its
best C sources, K = G*C in all. Let m_i be how often source i is picked. The layer's output is then

    sum_i m_i p_i E_i(x) / sum_i m_i p_i        with `norm_topk_prob`  (k cancels)
    sum_i (m_i / k) p_i E_i(x)                  without

So it is that of the source's best n experts, n = K / k, iff m_i = k for these n and 0 for all others (with normalisation any common m_i
will do). It then equals a source that activates n experts, but for the rounding of a sum over other terms.

`pairs`, `random` and `copy` deal each copy to G / k groups of its own: m_i = k iff the groups of every copy hold C each of the token's best
n. In the released case (G = K = 8, k = 4, n = 2): iff all four cuts separate the token's Top-1 from its Top-2. Where k = G every group
holds all experts, and there is nothing to separate: the layer is that of a source which activates its best C, for every token. A source
that activates more than n experts loses what the others gave; continued training has to win that back.

`ranked` deals classes of experts to the groups, all k copies of an expert to the same one: m_i = 1 for the best G iff the classes separate
them. Only one of the k copies is ever picked, because equal logits go to the lowest id.
"""
