// Y[m, n] = X[m, k'] · W[n, k']ᵀ with scales and a bias inside, for compute capability 9.0.
//
// Features are the rows of the product (operand A of wgmma, which alone can be 2:4 sparse), tokens are its columns. The grid is persistent:
// every cluster of CLUSTER_FEATURES × CLUSTER_TOKENS blocks takes one tile after the other from a table. One thread of a block brings stages
// of 128 bytes of k' by bulk copies; two warpgroups multiply 64 features each. Blocks of a cluster share what they bring by multicast.
// A finished tile waits, rounded to 16 bits, in registers, and is written while the next one is multiplied.
//
// Of fewer tokens than a box of activations has rows only those come, box_bytes a box: rows beyond the last token are slow to fill. What shared
// memory holds in their place is multiplied, too, and not written.
//
// With `early` no kernel that may still run writes weights, so the first stages bring theirs while the kernel before makes activations.
//
// With SPLIT the table may divide the steps of a tile among clusters that follow each other. The last of them finishes the tile. The others
// leave their sums in `partials`, which needs no value before: a flag is this launch's number, and who reads it takes it away. A cluster leaves
// its sums first and finishes its tile last, and waits only for clusters that start before it: all come to an end, however many run at once.
//
// Constants: TYPE 0 int8, 1 e4m3 (with scales of tokens and features), 2 bfloat16, 3 float16 (without); SPARSE 0, 1; TOKENS a tile;
// CLUSTER_FEATURES, CLUSTER_TOKENS; STAGES; OUT 0 bfloat16, 1 float16; BIAS 0 none, 1 bfloat16, 2 float16, 3 float32; DELAY 1 lets every role
// wait at random, to find races; SPLIT 0, 1. `multiply` is generated; device.cu stands between the two.

template <int N> struct At { static constexpr int value = N; };

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map,
     const u8* weights, const float* x_scale, const float* w_scale, const void* bias, const Item* items, u8* partials, u64 launch,
     int item_count, int steps, int m, int n, int box_bytes, int early) {
  extern __shared__ u8 raw[];
  const u32 stages = (shared_address(raw) + 1023) & ~1023u, out = stages + STAGES * STAGE, scales = out + OUT_BYTES;
  const u32 full = scales + WARPGROUPS * TOKENS * 4, empty = full + STAGES * 8;
  u32 rank = 0, cluster = blockIdx.x, clusters = gridDim.x;
  if (CLUSTER > 1) {
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));
  }
  const int feature_rank = rank % CLUSTER_FEATURES, token_rank = rank / CLUSTER_FEATURES, thread = threadIdx.x;
  if (thread == 0) {
    start_next_kernel();
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, WARPGROUPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CLUSTER > 1) cluster_sync(); else __syncthreads();
  const int warpgroup = __shfl_sync(~0u, thread >> 7, 0);  // uniform in a warp, so that setmaxnreg is honoured

  if (warpgroup == WARPGROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == WARPGROUPS * 128) {
      u16 same_features = 0;
      for (int t = 0; t < CLUSTER_TOKENS; t++) same_features |= 1 << (feature_rank + CLUSTER_FEATURES * t);
      const u16 same_tokens = ((1 << CLUSTER_FEATURES) - 1) << (CLUSTER_FEATURES * token_rank);
      const u16 x_mask = CLUSTER_FEATURES > 1 ? same_tokens : 0, w_mask = CLUSTER_TOKENS > 1 ? same_features : 0;
      constexpr int X_PART = X_BYTES / CLUSTER_FEATURES, W_PART = W_BYTES / CLUSTER_TOKENS;
      const int last_tile = (n - 1) / FEATURES;  // a cluster may reach beyond: it brings this one again, and nothing of it is written
      int slot = 0, held = early ? 0 : -1;  // stages that have their weights, while the kernel before may still write activations; then -1
      u32 phase = 1;
      if (!early) wait_for_kernel_before();
      for (int t = cluster; t < item_count; t += clusters) {
        const u32 tile = __ldg(&items[t].tile);
        const int feature_tile = min((int)(tile >> 16) * CLUSTER_FEATURES + feature_rank, last_tile);
        const int token_tile = (tile & 0xffff) * CLUSTER_TOKENS + token_rank, token = token_tile * TOKENS + feature_rank * (TOKENS / CLUSTER_FEATURES);
        const u8* from = weights + (size_t)feature_tile * steps * W_BYTES + token_rank * W_PART;
        u32 bytes = W_BYTES;
        for (int f = 0; f < CLUSTER_FEATURES; f++)
          if (token_tile * TOKENS + f * (TOKENS / CLUSTER_FEATURES) < m) bytes += box_bytes;
        auto bring_tokens = [&](int to_slot, int step) {
          const u32 to = stages + to_slot * STAGE + feature_rank * X_PART;
          if (token < m) copy_rows(to, &x_map, step * COLUMNS, token, full + to_slot * 8, x_mask);
        };
        const int first = SPLIT ? __ldg(&items[t].first) : 0, end = SPLIT ? first + __ldg(&items[t].count) : steps;
        from += (size_t)first * W_BYTES;
        for (int step = first; step < end; step++) {
          barrier_wait(empty + slot * 8, phase);
          delay();
          const u32 arrived = full + slot * 8, to = stages + slot * STAGE + X_BYTES + token_rank * W_PART;
          barrier_expect(arrived, bytes);
          if (SPARSE) {
            copy_bytes(to, from, W_PART, arrived, w_mask);
            from += W_BYTES;
          } else {
            copy_rows(to, &w_map, step * COLUMNS, feature_tile * FEATURES + token_rank * (FEATURES / CLUSTER_TOKENS), arrived, w_mask);
          }
          if (held < 0) {
            bring_tokens(slot, step);
          } else if (++held == STAGES || step + 1 == end) {
            wait_for_kernel_before();
            for (int i = 0; i < held; i++) bring_tokens(i, step + 1 - held + i);
            held = -1;
          }
          if (++slot == STAGES) {
            slot = 0;
            phase ^= 1;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_kernel_before();
    const int inside = thread & 127, lane = thread & 31, warp = inside >> 5;
    const u32 metadata_at = X_BYTES + warpgroup * BLOCK + VALUES + inside * 4, my_scales = scales + warpgroup * TOKENS * 4;
    const int row_in_chunk = (lane & 7) + ((lane >> 4) << 3), column16 = 2 * warp + ((lane >> 3) & 1);
    Sum sums[TOKENS / 2];
    u32 metadata[2][WORDS];  // of two stages: an instruction in flight still reads its own
    u32 held[TOKENS / 4];
    int held_row = -1, held_token = 0, slot = 0;
    u32 phase = 0;

    auto load_metadata = [&](auto parity) {
      if constexpr (SPARSE) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) metadata[parity.value][i] = load_shared(stages + slot * STAGE + metadata_at + 512 * i);
      }
    };
    auto multiply_stage = [&](auto parity, int add) {
      const u32 x = stages + slot * STAGE, w = x + X_BYTES + warpgroup * BLOCK;
      const u64 x_at = descriptor(x, 1024, 1), w_at = SPARSE ? descriptor(w, 512, 2) : descriptor(w, 1024, 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < INSTRUCTIONS; i++) {
        const u64 a = w_at + i * 2, b = x_at + i * (SPARSE ? 4 : 2);
        const u32 word = metadata[parity.value][SPARSE && WORDS == 2 ? i : 0];
        if (SPARSE && WORDS == 1 && i == 1) multiply<1>(sums, a, b, word, 1);  // the odd pairs of threads hold its metadata
        else multiply<0>(sums, a, b, word, i == 0 ? add : 1);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto release_previous = [&] {
      const u32 barrier = empty + (slot == 0 ? STAGES - 1 : slot - 1) * 8;
      if (CLUSTER == 1) {
        if (inside == 0) barrier_arrive(barrier);
      } else if (inside < CLUSTER) {
        barrier_arrive_at(barrier, inside);
      }
    };
    auto next_stage = [&] {
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
    };
    // A chunk of the held tile goes to shared memory, and from there to Y.
    auto put = [&](auto chunk) {
      if (BUFFERS == 1) {
        if (inside == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        warpgroup_sync(warpgroup);
      }
      const u32 buffer = out + (warpgroup * BUFFERS + chunk.value % BUFFERS) * CHUNK_BYTES;
#pragma unroll
      for (int j = 0; j < CHUNK / 16; j++) {
        const int row = j * 16 + row_in_chunk, o = (chunk.value * (CHUNK / 16) + j) * 4;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(buffer + row * 128 +
                                                                                                 ((column16 ^ (row & 7)) << 4)),
                     "r"(held[o]), "r"(held[o + 1]), "r"(held[o + 2]), "r"(held[o + 3])
                     : "memory");
      }
    };
    auto send = [&](auto chunk) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      if (BUFFERS > 1 && inside == 0)  // the next chunk's buffer is free
        asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS > 1 ? BUFFERS - 2 : 0) : "memory");
      warpgroup_sync(warpgroup);
      if (inside == 0) {
        const u32 buffer = out + (warpgroup * BUFFERS + chunk.value % BUFFERS) * CHUNK_BYTES;
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2}], [%3], %4;" ::"l"(&y_map),
                     "r"(held_row), "r"(held_token + chunk.value * CHUNK), "r"(buffer), "l"(KEEP_FIRST_OUT)
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    };
    auto each_chunk = [&](auto self, auto chunk, auto&& body) -> void {
      if constexpr (chunk.value < CHUNKS) {
        body(chunk);
        self(self, At<chunk.value + 1>(), body);
      }
    };
    // Two stages, and between their instructions a chunk of the held tile, or none (-1).
    auto two_stages = [&](int step, int count, int token, auto chunk) {
      delay();
      multiply_stage(At<0>(), step != 0);
      if constexpr (chunk.value >= 0)
        if (held_row >= 0) put(chunk);
      if (step) {
        multiply_wait<1>();
        release_previous();
      } else if (SCALED) {
        for (int i = inside; i < TOKENS; i += 128) {
          const float scale = token + i < m ? load_global(x_scale + token + i) : 0.f;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(my_scales + i * 4), "f"(scale) : "memory");
        }
      }
      next_stage();
      barrier_wait(full + slot * 8, phase);
      load_metadata(At<1>());
      multiply_stage(At<1>(), 1);
      if constexpr (chunk.value >= 0)
        if (held_row >= 0) send(chunk);
      multiply_wait<1>();
      release_previous();
      next_stage();
      if (step + 2 < count) {
        barrier_wait(full + slot * 8, phase);
        load_metadata(At<0>());
      }
    };

    auto part_at = [&](u32 of) { return partials + ((size_t)(of * CLUSTER + rank) * WARPGROUPS + warpgroup) * PART + inside * 16; };
    auto flag_at = [&](u32 of) { return partials + (size_t)gridDim.x * WARPGROUPS * PART + ((of * CLUSTER + rank) * WARPGROUPS + warpgroup) * 8; };

    for (int t = SPLIT ? this_cluster() : cluster; t < item_count; t += clusters) {
      const Item item = SPLIT ? item_at(items + t) : Item{__ldg(&items[t].tile), 0, steps, 0};
      const u32 tile = item.tile;
      const int count = SPLIT ? item.count : steps;
      if (SPLIT && count == 0) break;
      const int token = ((tile & 0xffff) * CLUSTER_TOKENS + token_rank) * TOKENS;
      barrier_wait(full + slot * 8, phase);
      load_metadata(At<0>());
      each_chunk(each_chunk, At<0>(), [&](auto chunk) {
        if (2 * chunk.value < count) {
          two_stages(2 * chunk.value, count, token, chunk);
        } else if (held_row >= 0) {
          put(chunk);
          send(chunk);
        }
      });
      for (int step = 2 * CHUNKS; step < count; step += 2) two_stages(step, count, token, At<-1>());
      const Item done = SPLIT ? item_at(items + t) : item;  // again: it would take registers of the loop
      const int row = ((done.tile >> 16) * CLUSTER_FEATURES + feature_rank) * FEATURES + warpgroup * 64;
      const int feature = row + warp * 16 + (lane >> 2);
      float w0 = 0.f, w1 = 0.f;
      if (SCALED) {
        if (feature < n) w0 = __ldg(w_scale + feature);
        if (feature + 8 < n) w1 = __ldg(w_scale + feature + 8);
      }
      multiply_wait<0>();
      settle(sums);
      release_previous();
      if (SPLIT && done.parts < 0) {
        leave(sums, part_at(this_cluster()));
        warpgroup_sync(warpgroup);  // all have left theirs
        if (inside == 0) raise(flag_at(this_cluster()), launch);
        held_row = -1;
        continue;
      }
      for (int i = 1; SPLIT && i <= done.parts; i++) {
        if (inside == 0) take(flag_at(this_cluster() - i), launch);
        warpgroup_sync(warpgroup);
        add(sums, part_at(this_cluster() - i));
      }
      if (SCALED) warpgroup_sync(warpgroup);  // the token scales lie there
      const float b0 = bias_at(bias, feature, n), b1 = bias_at(bias, feature + 8, n);
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
        float x0 = 0.f, x1 = 0.f;
        if (SCALED)
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x0), "=f"(x1) : "r"(my_scales + j * 32 + (lane & 3) * 8));
        held[2 * j] = rounded(scaled(sums[4 * j], w0, x0, b0), scaled(sums[4 * j + 1], w0, x1, b0));
        held[2 * j + 1] = rounded(scaled(sums[4 * j + 2], w1, x0, b1), scaled(sums[4 * j + 3], w1, x1, b1));
        if (SPLIT && SCALED && j % (TYPE ? 4 : 2) == (TYPE ? 3 : 1)) {
          // Nothing is changed, m being positive, but the next sums wait for these: ptxas would scale all of them into other registers.
          const u32 nothing = (u32)m >> 31 & held[2 * j + 1];
          w0 = __uint_as_float(__float_as_uint(w0) ^ nothing);
          w1 = __uint_as_float(__float_as_uint(w1) ^ nothing);
        }
        if (BIAS && j % 4 == 3) __syncwarp();  // or ptxas reads all scales ahead, and has a register too few
      }
      held_row = row;
      held_token = SPLIT ? ((done.tile & 0xffff) * CLUSTER_TOKENS + token_rank) * TOKENS : token;
      if (SCALED) warpgroup_sync(warpgroup);  // all have read the scales before the next tile's take their place
    }
    if (held_row >= 0)
      each_chunk(each_chunk, At<0>(), [&](auto chunk) {
        put(chunk);
        send(chunk);
      });
    if (inside == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (CLUSTER > 1) {  // no block leaves while another may still write to it or arrive at its barriers
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
}
