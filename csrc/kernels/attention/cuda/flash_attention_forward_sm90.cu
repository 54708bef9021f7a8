// Forward attention for Hopper (sm_90a), after FlashAttention-3 (Shah et al., 2024).
//
// The consumers hold queries and walk over blocks of keys and values. They take turns at the tensor
// cores: while one multiplies, the other computes its softmax. Each starts the scores of a block of
// keys together with the output of the previous block, whose probabilities are in registers.
#include "attention/cuda/cuda_attention_softmax.cuh"
#include "attention/cuda/cuda_hopper_attention.cuh"

namespace pypkg {
namespace {

constexpr int kKeys = 128;  // keys of a block
template <int kHeadDim>
constexpr int kStages = kHeadDim == 64 ? 4 : 2;

template <typename T, int kHeadDim>
using ForwardTiling = QueryTiling<T, kHeadDim, kKeys, kStages<kHeadDim>>;

struct HopperForward {
  FlashAttentionForward attention;
  QueryWork work;
};

#ifdef PYPKG_SM90A_INSTRUCTIONS

// A group of four warps with 64 queries of every tile.
template <typename T, int kHeadDim, bool kCapped>
class Consumer {
 public:
  using Tiling = ForwardTiling<T, kHeadDim>;

  __device__ Consumer(const HopperForward& p, typename Tiling::Storage& shared)
      : p_(p), shared_(shared), group_(threadIdx.x / kGroupThreads) {
    if (group_ == 1) pass_turn();  // the first turn is the other group's
  }

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for (TileWalk walk(p_.work.order); !walk.done(); walk.advance()) {
      const BlockTask task = walk.task();
      mbarrier_wait(shared_.held_full, parity);
      parity ^= 1;
      float out[1][kHeadDim / 8][4] = {};
      const ScoreRule rule(p_.attention.shape, task.b, task.head);
      SoftmaxState<1> softmax(rule.template unit<kCapped>());
      attend(task, rule, out, softmax);
      named_barrier_sync(kStoreBarrier + group_, kGroupThreads);
      store_result(p_.attention, task, out, softmax, shared_.held[0].result);
      fence_proxy_async();
      release(shared_.held_empty);
    }
    if (group_ == 0) wait_for_turn();  // takes the last turn that the other group passed on
  }

 private:
  using Scores = float[1][kKeys / 8][4];
  using Out = float[1][kHeadDim / 8][4];
  using Probabilities = PackedRows<kKeys>;

  __device__ __forceinline__ void attend(const BlockTask& task, const ScoreRule& rule, Out& out,
                                         SoftmaxState<1>& softmax) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const int first_row = task.first + warp_id() * 16;
    BlockState state = BlockState::kSkip;
    const auto seek = [&](int first) {
      return rule.template next_key_block<kTileRows, kKeys>(task.first, first, state);
    };
    int key = seek(0);
    if (key >= shape.seq_k) return;
    Probabilities p;
    {
      Scores scores;
      mbarrier_wait(shared_.k_full[k_.stage], k_.parity);
      wait_for_turn();
      wgmma_fence();
      start_transposed(scores[0], shared_.held[0].group[group_], shared_.k[k_.stage]);
      pass_turn();
      finish_scores<0>(scores[0]);
      if constexpr (kCapped) rule.template to_tangents<T>(scores);
      rule.template apply<false, kCapped>(scores, first_row, key, state);
      softmax.update(scores);
      pack_rows<T, kKeys>(p, scores[0]);
    }
    for (key = seek(key + kKeys); key < shape.seq_k; key = seek(key + kKeys)) {
      Scores scores;
      mbarrier_wait(shared_.k_full[k_.stage], k_.parity);
      mbarrier_wait(shared_.v_full[v_.stage], v_.parity);
      wait_for_turn();
      wgmma_fence();
      start_transposed(scores[0], shared_.held[0].group[group_], shared_.k[k_.stage]);
      start_product(out[0], p, shared_.v[v_.stage]);
      pass_turn();
      finish_scores<1>(scores[0]);
      if constexpr (kCapped) rule.template to_tangents<T>(scores);
      rule.template apply<false, kCapped>(scores, first_row, key, state);
      const RowValues<1> rescale = softmax.update(scores);
      finish_out(out[0], p);
      scale_rows(out, rescale);
      pack_rows<T, kKeys>(p, scores[0]);
    }
    mbarrier_wait(shared_.v_full[v_.stage], v_.parity);
    wgmma_fence();
    start_product(out[0], p, shared_.v[v_.stage]);
    finish_out(out[0], p);
  }

  template <int kInFlight>
  __device__ __forceinline__ void finish_scores(float (&scores)[kKeys / 8][4]) {
    wgmma_wait<kInFlight>();
    wgmma_finished(scores);
    release(shared_.k_empty[k_.stage]);
    k_.advance();
  }

  __device__ __forceinline__ void finish_out(float (&out)[kHeadDim / 8][4], Probabilities& p) {
    wgmma_wait<0>();
    wgmma_finished(out);
    wgmma_finished(p);
    release(shared_.v_empty[v_.stage]);
    v_.advance();
  }

  __device__ __forceinline__ void wait_for_turn() {
    named_barrier_sync(kTurnBarrier + group_, kConsumers);
  }
  __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurnBarrier + (group_ ^ 1), kConsumers);
  }

  const HopperForward& p_;
  typename Tiling::Storage& shared_;
  const int group_;
  RingPlace<kStages<kHeadDim>> k_, v_;
};

#endif

template <typename T, int kHeadDim, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward p) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  using Tiling = ForwardTiling<T, kHeadDim>;
  using Storage = typename Tiling::Storage;
  run_roles<Storage>(
      [&](Storage& shared) { return KeyProducer<Tiling>(p.attention.shape, p.work, shared); },
      [&](Storage& shared) { return Consumer<T, kHeadDim, kCapped>(p, shared); });
#endif
}

}  // namespace

void flash_attention_forward_sm90(const FlashAttentionForward& p, Stream stream) {
  dispatch_hopper(p.shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Tiling = ForwardTiling<T, kHeadDim>;
    const HopperForward params{p, query_work<Tiling>(p.shape, p.q, p.k, p.v)};
    launch_hopper<typename Tiling::Storage>(
        attention_site("flash_attention_forward (Hopper)", p.shape),
        hopper_forward_kernel<T, kHeadDim, decltype(capped)::value>, params, params.work.order,
        stream);
  });
}

}  // namespace pypkg
