//! Unit tests of the private items of `src/net/datagrams/batch.rs`.

use super::*;

#[test]
fn gso_batch_is_full_at_a_longer_datagram_after_a_shorter_one_and_at_the_limits() {
    let batches = |lengths: &[usize], header: usize| {
        let mut buffer = Vec::new();
        let (mut batch, mut counts) = (GsoBatch::new(&mut buffer), Vec::new());
        batch.begin(([127, 0, 0, 1], 9).into(), |buffer| buffer.resize(header, 0));
        for length in lengths {
            if !batch.push(&vec![0; *length]) {
                counts.push(batch.count);
                batch.clear();
                assert!(batch.push(&vec![0; *length]), "everything fits into an empty batch");
            }
        }
        [counts, vec![batch.count]].concat()
    };
    assert_eq!(batches(&[5, 5, 5], 0), [3]);
    assert_eq!(batches(&[5, 5, 4, 4], 0), [3, 1], "nothing fits after a shorter one");
    assert_eq!(batches(&[5, 6, 6], 0), [1, 2], "a longer one does not fit");
    assert_eq!(batches(&[5, 0, 0, 5], 0), [1, 1, 1, 1], "an empty one is sent alone");
    assert_eq!(batches(&[5, 0, 0, 0], 10), [2, 2], "with a header it is not empty");
    assert_eq!(batches(&[1; 130], 0), [64, 64, 2]);
    assert_eq!(batches(&[21_835; 4], 0), [3, 1], "65507 bytes at most");
    assert_eq!(batches(&[21_836; 4], 0), [2, 2]);
    assert_eq!(batches(&[21_830; 4], 10), [2, 2], "headers included");
}
