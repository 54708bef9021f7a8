// What a query may see, as a description: never a [sequence, sequence] matrix.
//
// Plain C++ shared by host and device, so that the decisions which blocks run and which elements
// count are tested on the CPU and used unchanged by the CUDA kernels.
#pragma once

#include "common/common.h"

namespace pypkg {

// Let i be the position of a query and j that of a key, in the sequence that their blocks are of.
// The key is visible if all of these hold:
//   causal:          j <= i, or j < prefix_lengths[b] when given
//   window >= 1:     i - j < window (the query itself and window - 1 keys before it)
//   document_starts: document_starts[b, i] == document_starts[b, j]
// alibi_slopes adds alibi_slopes[h] * (j - i) to the scaled score (Press et al., 2022).
struct AttentionMask {
  bool causal = true;
  int32_t window = 0;                        // 0: no window
  const int32_t* prefix_lengths = nullptr;   // [batch] or null
  const int32_t* document_starts = nullptr;  // [batch, tokens], position of the first token of the
                                             // document each token is in, non-decreasing; or null
  int64_t tokens = 0;                        // in a row of document_starts: the whole sequence
  const float* alibi_slopes = nullptr;       // [heads_q] or null
};

PYPKG_HOST_DEVICE bool is_visible(const AttentionMask& mask, int64_t b, int64_t i, int64_t j) {
  if (mask.causal && j > i && !(mask.prefix_lengths && j < mask.prefix_lengths[b])) return false;
  if (mask.window > 0 && i - j >= mask.window) return false;
  if (mask.document_starts) {
    const int32_t* starts = mask.document_starts + b * mask.tokens;
    if (starts[i] != starts[j]) return false;
  }
  return true;
}

enum class BlockState : int {
  kSkip = 0,     // no query of the block sees a key of the block
  kPartial = 1,  // is_visible must be asked for every element
  kFull = 2,     // every query sees every key
};

// State of the block of positions [i_begin, i_end) x [j_begin, j_end). Both ranges must be
// non-empty, and inside the sequence if there are document_starts.
//
// The answer is exact, for combinations too. Where the two ranges share a position, that position
// sees itself; where they do not, the pair of positions closest to each other is allowed by every
// condition that allows any pair, and kFull asks each condition for all pairs.
//
// Position is int64_t, or int where sequences are short enough for differences of positions.
template <typename Position>
PYPKG_HOST_DEVICE BlockState key_block_state(const AttentionMask& mask, int64_t b, Position i_begin,
                                             Position i_end, Position j_begin, Position j_end) {
  const Position i_last = i_end - 1;
  const Position j_last = j_end - 1;
  bool full = true;
  if (mask.causal) {
    const Position prefix_last = mask.prefix_lengths ? mask.prefix_lengths[b] - 1 : -1;
    if (j_begin > i_last && j_begin > prefix_last) return BlockState::kSkip;
    full = j_last <= i_begin || j_last <= prefix_last;
  }
  if (mask.window > 0) {
    if (i_begin - j_last >= mask.window) return BlockState::kSkip;
    full = full && i_last - j_begin < mask.window;
  }
  if (mask.document_starts) {
    const int32_t* starts = mask.document_starts + b * mask.tokens;
    if (starts[j_last] < starts[i_begin] || starts[j_begin] > starts[i_last]) {
      return BlockState::kSkip;
    }
    full = full && starts[i_begin] == starts[i_last] && starts[j_begin] == starts[j_last];
  }
  return full ? BlockState::kFull : BlockState::kPartial;
}

}  // namespace pypkg
